"""The web server: stores of examples and a model behind HTTP, for the viewer and for programs."""
