"""Who may ask, for which models, and how much a minute."""
