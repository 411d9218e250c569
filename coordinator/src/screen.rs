//! Lines that are redrawn in place on a terminal, and written one after the other elsewhere.

use std::io::{IsTerminal, Write};

/// Where text goes for a person.
pub struct Screen {
    out: Box<dyn Write>,
    terminal: bool,
    drawn: usize,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen")
            .field("terminal", &self.terminal)
            .finish_non_exhaustive()
    }
}

impl Screen {
    /// Writes to standard output, or to standard error where that carries JSON.
    #[must_use]
    pub fn new(to_stderr: bool) -> Self {
        let (out, terminal): (Box<dyn Write>, bool) = if to_stderr {
            (Box::new(std::io::stderr()), std::io::stderr().is_terminal())
        } else {
            (Box::new(std::io::stdout()), std::io::stdout().is_terminal())
        };
        Self {
            out,
            terminal,
            drawn: 0,
        }
    }

    /// Whether it can be redrawn.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes text that stays.
    pub fn put(&mut self, text: &str) {
        // The display may go away; what is shown goes on.
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }

    /// Removes what was drawn last.
    pub fn wipe(&mut self) {
        if self.drawn > 0 {
            let up = format!("\x1b[{}A\x1b[J", self.drawn);
            self.put(&up);
            self.drawn = 0;
        }
    }

    /// Draws lines in place of those before, if it is a terminal.
    pub fn draw(&mut self, lines: &[String]) {
        self.wipe();
        let text = lines.join("\n") + "\n";
        self.put(&text);
        if self.terminal {
            self.drawn = lines.len();
        }
    }

    /// Leaves what was drawn where it is.
    pub fn keep(&mut self) {
        self.drawn = 0;
    }
}
