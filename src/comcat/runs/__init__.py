"""What any long run needs: a loop that can be stopped at any moment and goes on where it stopped."""
