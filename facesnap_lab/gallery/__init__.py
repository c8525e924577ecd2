"""The images of docs/gallery.md: a plan, and the command that generates them with a running WebUI."""
