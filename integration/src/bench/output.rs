//! The found as text for the terminal, as Markdown, and as JSON.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sidecar::protocol::types::QemuBuild;

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

/// What a section is called in a document: there is one for each kind of QEMU, if it matters.
fn heading(section: &Section, machine: &Machine) -> String {
    match machine.qemu {
        _ if section.without_qemu => format!("### `{}`:", section.name),
        QemuBuild::Stock => format!("### `{}`:", section.name),
        QemuBuild::Patched => format!("### `{}`, patched QEMU:", section.name),
    }
}

/// A section as Markdown, to stand between the markers.
fn markdown(machine: &Machine, date: &str, section: &Section, quick: bool) -> String {
    let command = section.command.clone().unwrap_or_else(|| {
        let quick = if quick { " --quick" } else { "" };
        format!("muster-testbed bench {}{quick}", section.name)
    });
    let mut text = format!(
        "{} {}\n\n`{command}` ({:.0} s), {date}, on {}.\n\n{}\n\n{}",
        heading(section, machine),
        section.title,
        section.took_s,
        machine.line(),
        section.setup,
        markdown_table(&figures(section)),
    );
    if quick {
        text.push_str("\n**Smoke run (`--quick`): too few measurements to judge by.**\n");
    }
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
    text
}

/// Puts a section between the markers of a document: in the place of the same section measured
/// before, or behind the others. What else stands there stays.
///
/// # Errors
/// The document has no markers, or cannot be read or written.
pub fn put_section(
    path: &Path,
    machine: &Machine,
    date: &str,
    section: &Section,
    quick: bool,
) -> Result<()> {
    let text = markdown(machine, date, section, quick);
    let shown = path.display();
    let old = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    let Some(new) = with_section(&old, &heading(section, machine), &text) else {
        bail!("{shown} has no line `{BEGIN}` followed by `{END}`");
    };
    std::fs::write(path, new).with_context(|| format!("cannot write {shown}"))
}

fn with_section(old: &str, head: &str, text: &str) -> Option<String> {
    let (before, rest) = old.split_once(BEGIN)?;
    let (inside, after) = rest.split_once(END)?;
    let mut sections: Vec<&str> = Vec::new();
    let mut left = inside.trim_start();
    while left.starts_with("### `") {
        let end = left[1..].find("\n### `").map_or(left.len(), |at| at + 2);
        sections.push(left[..end].trim_end());
        left = &left[end..];
    }
    let text = text.trim_end();
    match sections.iter_mut().find(|old| old.starts_with(head)) {
        Some(old) => *old = text,
        None => sections.push(text),
    }
    Some(format!(
        "{before}{BEGIN}\n{}\n{END}{after}",
        sections.join("\n\n")
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
    fn only_the_section_itself_is_replaced() {
        let old = format!("head\n{BEGIN}\n{END}\ntail\n");
        let one = with_section(&old, "### `one`:", "### `one`: 1\n\ntext\n").unwrap();
        let both = with_section(&one, "### `two`:", "### `two`: 2").unwrap();
        let inside = "### `one`: 1\n\ntext\n\n### `two`: 2";
        assert_eq!(both, format!("head\n{BEGIN}\n{inside}\n{END}\ntail\n"));
        let new = with_section(&both, "### `one`:", "### `one`: 3").unwrap();
        assert!(new.contains("### `one`: 3\n\n### `two`: 2\n"), "{new}");
        assert_eq!(
            with_section(&new, "### `two`:", "### `two`: 2").unwrap(),
            new
        );
        assert_eq!(with_section("nothing", "### `one`:", "new"), None);
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
