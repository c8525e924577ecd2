"""The paper's ablations (Tables 2 and 3): each variant is trained and measured in the miniature world."""
