"""Who the ranks are, and how they reach each other."""
