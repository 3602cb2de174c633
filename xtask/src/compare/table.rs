//! A table that reads well on a terminal and is Markdown.

use std::fmt;

/// A head and lines of as many cells.
pub(crate) struct Table {
    lines: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        Table { lines: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub(crate) fn line(&mut self, cells: Vec<String>) {
        self.lines.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.lines.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |line: &Vec<String>, column: usize| line.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.lines.iter().map(|line| cell(line, column).chars().count()).max().unwrap_or(0))
            .collect();
        for (number, line) in self.lines.iter().enumerate() {
            for (column, &width) in widths.iter().enumerate() {
                // The first column is words, the others are figures.
                match column {
                    0 => write!(f, "| {:<width$} ", cell(line, column))?,
                    _ => write!(f, "| {:>width$} ", cell(line, column))?,
                }
            }
            writeln!(f, "|")?;
            if number == 0 {
                for (column, &width) in widths.iter().enumerate() {
                    match column {
                        0 => write!(f, "|{}", "-".repeat(width + 2))?,
                        _ => write!(f, "|{}:", "-".repeat(width + 1))?,
                    }
                }
                writeln!(f, "|")?;
            }
        }
        Ok(())
    }
}

/// The value in the middle, or the mean of the two there. `None` of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get(values.len().checked_sub(1)? / 2)?;
    Some((lower + upper) / 2.0)
}

/// Lines of text out of their words.
pub(crate) trait ConcatLines {
    /// Each after `mark`, and on a line of its own.
    fn concat_lines(&self, mark: &str) -> String;
}

impl ConcatLines for Vec<String> {
    fn concat_lines(&self, mark: &str) -> String {
        self.iter().map(|line| format!("{mark}{line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
    }

    #[test]
    fn figures_stand_under_each_other() {
        let mut table = Table::new(&["what", "s"]);
        table.line(vec!["a".into(), "1.25".into()]);
        assert_eq!(table.to_string(), "| what |    s |\n|------|-----:|\n| a    | 1.25 |\n");
    }
}
