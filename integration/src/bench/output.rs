//! The found as text for the terminal, as Markdown, and as JSON.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::machine::Machine;
use super::result::{Bound, Figure, Section, Table};

/// Between these lines of a document stands what a run printed.
pub const BEGIN: &str = "<!-- bench:begin -->";
/// See [`BEGIN`].
pub const END: &str = "<!-- bench:end -->";

/// A number with as many digits as are of use.
#[must_use]
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text
        .trim_start_matches('-')
        .chars()
        .all(|c| "0.".contains(c))
    {
        return "0".to_owned();
    }
    text
}

fn bound(figure: &Figure) -> String {
    let of = figure.statistic.as_str();
    match figure.bound {
        None => "-".to_owned(),
        Some(Bound::AtMost(most)) => format!("{of} ≤ {}", number(most)),
        Some(Bound::AtLeast(least)) => format!("{of} ≥ {}", number(least)),
    }
}

fn verdict(figure: &Figure) -> &'static str {
    match figure.verdict() {
        None => "-",
        Some(true) => "kept",
        Some(false) => "MISSED",
    }
}

/// The figures of a section as a table.
#[must_use]
pub fn figures(section: &Section) -> Table {
    let row = |figure: &Figure| {
        let of = |value: fn(&super::stats::Spread) -> String| {
            figure.spread.as_ref().map_or("?".to_owned(), value)
        };
        vec![
            figure.what.clone(),
            figure.unit.to_owned(),
            of(|spread| number(spread.median)),
            of(|spread| format!("{} to {}", number(spread.q1), number(spread.q3))),
            of(|spread| number(spread.p95)),
            of(|spread| format!("{} to {}", number(spread.min), number(spread.max))),
            of(|spread| spread.n.to_string()),
            bound(figure),
            verdict(figure).to_owned(),
        ]
    };
    Table {
        title: section.title.to_owned(),
        columns: vec![
            "figure",
            "unit",
            "median",
            "quartiles",
            "p95",
            "range",
            "n",
            "bound",
            "verdict",
        ],
        rows: section.figures.iter().map(row).collect(),
    }
}

/// A table in columns, for the terminal.
#[must_use]
pub fn columns(table: &Table) -> String {
    let width = |column: usize| {
        let head = table.columns[column].chars().count();
        let cells = table.rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .fold(head, usize::max)
    };
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let mut text = String::new();
    let heads: Vec<String> = table
        .columns
        .iter()
        .map(|head| (*head).to_owned())
        .collect();
    for row in std::iter::once(&heads).chain(&table.rows) {
        let mut line = String::from(" ");
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if column == 0 {
                write!(line, " {cell:<width$}")
            } else {
                write!(line, "  {cell:>width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A section for the terminal.
#[must_use]
pub fn terminal(section: &Section) -> String {
    let mut text = format!("\n{}: {}\n", section.name, section.title);
    for table in &section.tables {
        let _ = write!(text, "  {}\n{}\n", table.title, columns(table));
    }
    text.push_str(&columns(&figures(section)));
    for note in &section.notes {
        let _ = writeln!(text, "  {note}");
    }
    text
}

fn markdown_table(table: &Table) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | ").replace('\n', " "));
    let heads: Vec<String> = table
        .columns
        .iter()
        .map(|head| (*head).to_owned())
        .collect();
    let rule: Vec<String> = heads.iter().map(|_| "---".to_owned()).collect();
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    line(&heads) + &line(&rule) + &rows
}

/// Everything as Markdown, to stand between the markers.
#[must_use]
pub fn markdown(machine: &Machine, date: &str, sections: &[Section], quick: bool) -> String {
    let mut text = format!("Measured {date} on {}.\n", machine.line());
    if quick {
        text.push_str("\n**Smoke run (`--quick`): too few measurements to judge by.**\n");
    }
    for section in sections {
        let _ = write!(
            text,
            "\n### `{}`: {}\n\n`muster-testbed bench {}{}` ({:.0} s). {}\n\n{}",
            section.name,
            section.title,
            section.name,
            if quick { " --quick" } else { "" },
            section.took_s,
            section.setup,
            markdown_table(&figures(section)),
        );
        for note in &section.notes {
            let _ = write!(text, "\n{note}\n");
        }
        for table in &section.tables {
            let _ = write!(
                text,
                "\n<details><summary>{}</summary>\n\n{}\n</details>\n",
                table.title,
                markdown_table(table)
            );
        }
    }
    text
}

/// Puts `text` between the markers of a document.
///
/// # Errors
/// It has no markers, or cannot be read or written.
pub fn replace_between_markers(path: &Path, text: &str) -> Result<()> {
    let name = path.display();
    let old = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    let Some(new) = between(&old, text) else {
        bail!("{name} has no line `{BEGIN}` followed by `{END}`");
    };
    std::fs::write(path, new).with_context(|| format!("cannot write {name}"))
}

fn between(old: &str, text: &str) -> Option<String> {
    let (before, rest) = old.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!(
        "{before}{BEGIN}\n{}\n{END}{after}",
        text.trim_end()
    ))
}

/// Everything as JSON.
#[must_use]
pub fn report(machine: &Machine, date: &str, sections: &[Section], quick: bool) -> Value {
    let section = |section: &Section| {
        let mut value = json!(section);
        for (entry, figure) in value["figures"]
            .as_array_mut()
            .into_iter()
            .flatten()
            .zip(&section.figures)
        {
            entry["kept"] = json!(figure.verdict());
        }
        value
    };
    json!({
        "schema_version": 1,
        "date": date,
        "quick": quick,
        "machine": machine,
        "benchmarks": sections.iter().map(section).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::result::Statistic;
    use super::*;

    fn section() -> Section {
        let mut section = Section::new("moves", "twenty moves", "Three guests.".to_owned());
        section.figures.push(Figure::bounded(
            "resume skew",
            "ms",
            &[1.25, 2.0, 30.0],
            Statistic::P95,
            Bound::AtMost(15.0),
        ));
        section
            .figures
            .push(Figure::told("split time", "s", &[0.0]));
        section
    }

    #[test]
    fn the_terminal_shows_figures_with_their_verdicts() {
        let text = terminal(&section());
        assert!(text.contains("resume skew"), "{text}");
        assert!(text.contains("p95 ≤ 15.00   MISSED"), "{text}");
        assert!(text.contains("1.25 to 30.00"), "{text}");
    }

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let old = format!("head\n{BEGIN}\nold\n{END}\ntail\n");
        let new = between(&old, "new\n").unwrap();
        assert_eq!(new, format!("head\n{BEGIN}\nnew\n{END}\ntail\n"));
        assert_eq!(between(&new, "new").unwrap(), new);
        assert_eq!(between("nothing", "new"), None);
    }

    #[test]
    fn numbers_have_the_digits_that_are_of_use() {
        let shown: Vec<String> = [0.0, -0.0001, 0.0123, 4.567, 123.45, 98765.4]
            .into_iter()
            .map(number)
            .collect();
        assert_eq!(shown, ["0", "0", "0.012", "4.57", "123.5", "98765"]);
    }
}
