"""Several copies of a model behind one endpoint."""
