"""Speed and accuracy beside peers: make bench."""
