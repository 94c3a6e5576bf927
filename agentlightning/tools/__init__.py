"""What one does with run directories from outside of a run: look, verify, compare, export, prune, plot.

Paths and names enter, plain data leaves; `console.py` alone shows it, and `agentlightning/cli.py` alone knows the command line.
Nothing here needs a trainer, a GPU or Ray, and a run may go on in the directory meanwhile.
"""
