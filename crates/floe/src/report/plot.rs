//! Plots as SVG. Colours are classes, so that the page decides on light and dark.

use std::fmt::Write as _;

/// Width of every plot in its own units; the page scales it.
const WIDTH: f64 = 440.0;
const ROW: f64 = 24.0;
/// Room for a label of [`LETTERS`] wide ones: what does not fit would be cut off at its beginning.
const LABEL: f64 = 146.0;
const LETTERS: usize = 18;
const VALUE: f64 = 78.0;
/// What is small beside the longest is still seen.
const THINNEST: f64 = 1.0;
/// Classes of colours for generations; older ones share the last.
const SHADES: usize = 6;

/// One bar: parts one after another.
pub struct Bar {
    /// What stands before it.
    pub label: String,
    /// What stands behind it.
    pub value: String,
    /// What a pointer shows.
    pub hint: String,
    /// Lengths, each with the class of its colour.
    pub parts: Vec<(f64, String)>,
}

/// Horizontal bars, the longest as wide as there is room.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let total = |bar: &Bar| bar.parts.iter().map(|(length, _)| length).sum::<f64>();
    let most = bars.iter().map(total).fold(f64::MIN_POSITIVE, f64::max);
    let height = ROW * bars.len() as f64 + 4.0;
    let mut svg = format!(
        "<svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {height}\">",
        escape(title)
    );
    for (number, bar) in bars.iter().enumerate() {
        let y = ROW * number as f64 + 2.0;
        // Writing to a String cannot fail.
        let _ = write!(
            svg,
            "<g><title>{}</title><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            escape(&bar.hint),
            LABEL - 8.0,
            y + 16.0,
            escape(&shortened(&bar.label, LETTERS))
        );
        let mut x = LABEL;
        for (length, class) in bar.parts.iter().filter(|(length, _)| *length > 0.0) {
            let width = (length / most * (WIDTH - LABEL - VALUE)).max(THINNEST);
            let _ = write!(
                svg,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{}\" rx=\"2\"/>",
                y + 4.0,
                ROW - 10.0
            );
            x += width;
        }
        let _ = write!(
            svg,
            "<text class=\"value\" x=\"{:.1}\" y=\"{}\">{}</text></g>",
            x + 6.0,
            y + 16.0,
            escape(&bar.value)
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Class of the colour for a generation, counted from the newest.
pub fn shade(from_newest: usize) -> String {
    format!("g{}", from_newest.min(SHADES - 1))
}

/// The end of a long name says more than its beginning.
fn shortened(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(count - most + 1).collect();
    format!("…{tail}")
}

/// Text that cannot end its element or attribute.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            letter if letter.is_control() => out.push('\u{fffd}'),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(label: &str, length: f64) -> Bar {
        Bar {
            label: label.into(),
            value: "<1>".into(),
            hint: String::new(),
            parts: vec![(length, shade(0)), (0.0, shade(1))],
        }
    }

    #[test]
    fn labels_fit_and_no_part_of_a_bar_vanishes() {
        let long = "4194304 /usr/lib/x86_64-linux-gnu/libc.so.6";
        let svg = bars("T", &[bar(long, 1e9), bar("x", 1.0), bar("y", 0.0)]);
        assert!(svg.contains("…") && !svg.contains("4194304"), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 2, "{svg}");
        assert!(svg.contains("width=\"1.0\""), "{svg}");
        assert!(svg.contains("&lt;1&gt;"), "{svg}");
        // The widest letters that names have are some 7 units wide.
        assert!(LETTERS as f64 * 7.0 <= LABEL - 8.0);
    }
}
