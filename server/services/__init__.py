"""What the server does for a request, without HTTP."""
