"""How a model is spread over a mesh, and the canonical state that lets any layout continue any other's run."""
