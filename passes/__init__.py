"""The passes, one technique a file; a file dropped into a family folder is found by its name."""
