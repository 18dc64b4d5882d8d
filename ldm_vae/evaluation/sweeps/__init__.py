"""Many trainings, one table: the rate-distortion frontier and the comparison of kinds."""
