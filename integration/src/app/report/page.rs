//! The page: tables and picture in one file that needs no other.

use std::fmt::Write as _;

use super::Report;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;color:#1d2733;max-width:1120px;margin:2em auto;padding:0 1em}\
h1{font-size:1.5em}h2{font-size:1.1em;margin-top:1.8em}p{color:#5d6b7a}\
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88em}\
th,td{text-align:left;padding:.3em .8em;border-bottom:1px solid #e3e7ec;white-space:nowrap}\
th{color:#5d6b7a;font-weight:600}.violated{color:#d6303a;font-weight:600}svg{width:100%;height:auto}";

/// The page with this picture in it.
pub(super) fn page(report: &Report, picture: &str) -> String {
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>What users feel of a move</title><style>{STYLE}</style></head><body>\n\
         <h1>What users feel of a move</h1>\n<p>{}</p>\n",
        escaped(&report.setting)
    );
    for notice in &report.notices {
        let _ = writeln!(html, "<p class=\"violated\">{}</p>", escaped(notice));
    }
    html.push_str(picture);
    for (title, rows) in report.tables() {
        let _ = writeln!(
            html,
            "<h2>{}</h2><div class=\"scroll\"><table>",
            escaped(title)
        );
        for (index, row) in rows.iter().enumerate() {
            let cell = if index == 0 { "th" } else { "td" };
            html.push_str("<tr>");
            for text in row {
                let class = if text.contains("violated") {
                    " class=\"violated\""
                } else {
                    ""
                };
                let _ = write!(html, "<{cell}{class}>{}</{cell}>", escaped(text));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table></div>\n");
    }
    html.push_str("</body></html>\n");
    html
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_markup_is_escaped() {
        assert_eq!(escaped("a<b & c>"), "a&lt;b &amp; c&gt;");
    }
}
