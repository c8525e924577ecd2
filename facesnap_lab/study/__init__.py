"""A blind preference study, like the one in the paper's Fig. 3: a page that collects choices, and their evaluation.

study/            the folder for participants: index.html and images with names that say nothing
study-key.json    which image is whose; stays with the laboratory
answers-*.json    written by the page, one per participant
"""
