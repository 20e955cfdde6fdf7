"""What people read: report.html, plots, tables, the terminal."""
