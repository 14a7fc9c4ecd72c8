"""The loop that trains any system, and what makes it stop and resume exactly."""
