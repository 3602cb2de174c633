//! The picture: bars of seconds and of bytes, a panel for each guest and link.

use std::fmt::Write;

use super::cases::Setting;
use super::report::Case;
use super::run::{Run, Runs};

/// All lengths are in pixels.
const WIDTH: u32 = 1000;
const LABELS: u32 = 190;
const BARS: u32 = 290;
/// For the figure behind a bar.
const FIGURES: u32 = 110;
const LINE: u32 = 20;
const HEAD: u32 = 40;
const GAP: u32 = 14;

/// One half of a panel.
struct Half {
    left: u32,
    unit: &'static str,
    figure: fn(&Run) -> f64,
}

const HALVES: [Half; 2] = [
    Half { left: LABELS, unit: "seconds", figure: |run| run.seconds },
    Half { left: LABELS + BARS + FIGURES, unit: "MB on the wire", figure: |run| run.wire_bytes as f64 / 1e6 },
];

/// The picture of these cases.
pub(super) fn svg(cases: &[Case]) -> String {
    let height: u32 = cases.iter().map(panel_height).sum::<u32>() + GAP;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut top = GAP;
    for case in cases {
        panel(&mut text, case, top);
        top += panel_height(case);
    }
    text + "</svg>\n"
}

fn panel_height(case: &Case) -> u32 {
    HEAD + case.results.len() as u32 * LINE + GAP
}

fn panel(text: &mut String, case: &Case, top: u32) {
    let title = format!("{} over {}", case.guest.title(), case.link.title());
    words(text, 10, top + 12, "font-weight=\"bold\"", &title);
    for half in &HALVES {
        words(text, half.left, top + 30, "fill=\"#666\"", half.unit);
        let value = |runs: &Runs| runs.median(half.figure).unwrap_or_default();
        let most = case.results.iter().map(|(_, runs)| value(runs)).fold(f64::MIN_POSITIVE, f64::max);
        for ((setting, runs), at) in case.results.iter().zip(0..) {
            let y = top + HEAD + at * LINE;
            let long = f64::from(BARS) * value(runs) / most;
            let done = runs.done().count() > 0;
            // What was not done is an outline: the bar would go on.
            let paint = match (done, setting.path().is_some()) {
                (true, true) => "fill=\"#d9730d\"",
                (true, false) => "fill=\"#7a8aa0\"",
                (false, _) => "fill=\"none\" stroke=\"#b00\" stroke-dasharray=\"4 3\"",
            };
            let _ = writeln!(
                text,
                "<rect x=\"{}\" y=\"{}\" width=\"{long:.1}\" height=\"{}\" {paint}/>",
                half.left,
                y + 2,
                LINE - 6
            );
            let figure =
                if done { format!("{:.1}", value(runs)) } else { format!("{:.1}, not done", value(runs)) };
            words(text, half.left + long as u32 + 5, y + 14, "", &figure);
        }
    }
    for ((setting, _), at) in case.results.iter().zip(0..) {
        label(text, *setting, top + HEAD + at * LINE + 14);
    }
}

fn label(text: &mut String, setting: Setting, y: u32) {
    words(text, LABELS - 8, y, "text-anchor=\"end\"", setting.title());
}

fn words(text: &mut String, x: u32, y: u32, how: &str, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    // Writing to a string cannot fail.
    let _ = writeln!(text, "<text x=\"{x}\" y=\"{y}\" {how}>{what}</text>");
}
