"""What people look at: the report page, tables, SVG, galleries and matplotlib pictures."""
