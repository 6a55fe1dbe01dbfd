"""Layer 7: what stands behind the commands, one file each. Functions return data; cli.py prints."""
