"""Training: the one loop, the engines it steps, what guards a step, and the state it goes on from."""
