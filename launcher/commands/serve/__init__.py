"""`sparring serve`: what a run has learnt, over HTTP."""
