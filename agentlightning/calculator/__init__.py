"""The embedded default: word problems, a calculator as the tool, data, and the small base scripts/make_tiny_base.py makes."""
