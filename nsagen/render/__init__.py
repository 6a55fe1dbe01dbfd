"""Layer 4: plan -> text. view.py answers what the templates ask; module.py renders the frame."""
