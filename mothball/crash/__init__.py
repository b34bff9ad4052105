"""What is known of a failure, and the package with which somebody else can see, run and compare it."""
