"""Requirements of other libraries, and the tools that make and check fixtures with them."""
