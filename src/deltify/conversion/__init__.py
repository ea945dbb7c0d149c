"""From a teacher to a student: reading teachers, and where every tensor of a student comes from."""
