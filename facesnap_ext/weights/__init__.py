"""Weight files: recognising, reading, converting and writing them."""
