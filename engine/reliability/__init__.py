"""What survives a failure: heartbeats, the watchdog, preemption, the lock of a run, the record of what went wrong."""
