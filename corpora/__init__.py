"""What people wrote -> checked records. Knows pictures and text, no tensor and no store."""
