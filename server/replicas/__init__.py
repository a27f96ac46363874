"""Several servers behind one address, on Ray Serve. Only `deployment` imports Ray, and no other part of the server
imports anything of this package."""
