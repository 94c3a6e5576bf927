"""The frozen base, its adapters, and the passes over them."""
