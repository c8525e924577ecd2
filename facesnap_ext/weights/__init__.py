"""Weight files: finding, recognising, reading, converting, downloading and writing them."""
