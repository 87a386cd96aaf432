"""Inside the user's own training script: where another library holds the loop."""
