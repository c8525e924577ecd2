"""What a user can set for each person, and its forms in the API and in infotext."""
