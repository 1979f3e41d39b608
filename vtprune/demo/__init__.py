"""The demo that compares kept patches: plain data behind it, and a page on top. Import what you need from its files."""
