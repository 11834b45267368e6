"""`python -m launcher report RUN...`: runs on one page of HTML, side by side, read from their folders alone."""
