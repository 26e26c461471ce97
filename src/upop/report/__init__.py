"""The report of a study: claims judged, figures and tables, one page; needs no torch and writes nothing."""
