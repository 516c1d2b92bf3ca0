"""Attribution graphs: a prompt through transcoders, in which every edge is a linear effect."""
