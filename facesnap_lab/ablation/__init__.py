"""The paper's Tables 2 and 3: each variant trained and measured in the miniature."""
