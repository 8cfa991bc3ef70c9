"""The two studies of the Stream paper (Rosser et al. 2025, arXiv:2510.19875), for whoever has the weights."""
