"""Tables, plots and pages made from results; no numbers are computed here."""
