"""What stands where a host's module stood."""
