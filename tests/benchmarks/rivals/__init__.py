"""What dtrain is measured against: the same training by other means, with the settings a careful engineer gives it."""
