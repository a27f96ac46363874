"""`posterior calibrate` of text: the engine writes the answers, as it will when it serves."""
