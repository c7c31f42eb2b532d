"""What more ranks would give: step time and speed-up to accuracy, predicted from measurements and priced networks."""
