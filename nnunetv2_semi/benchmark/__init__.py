"""Label-efficiency studies: data sets with fewer labels, matched trainings, and the report on them."""
