//! `cargo xtask coverage`: which lines of a crate the tests run, by LLVM's instrumentation.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dwcp_tests::target_dir;

use crate::run::{bounded, cargo, output, root, run};
use crate::setup::setup_or_skip;

/// For a build from nothing, or for all the tests, slower by what counting costs.
const LIMIT: Duration = Duration::from_secs(60 * 60);
/// For LLVM's tools.
const TOOLS: Duration = Duration::from_secs(10 * 60);
/// Crates whose tests are run: all that runs code of [`CRATES`].
const RUN: [&str; 3] = ["dwcp-proto", "dwcp-migrate", "dwcp-tests"];
/// Folders below `crates` whose lines are counted unless others are asked for.
const CRATES: [&str; 2] = ["proto", "migrate"];
/// Agents that are killed write nothing; of the others each adds to one of these files.
const PROFILES: &str = "%8m.profraw";

/// What to measure, with what.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The folder of llvm-profdata and llvm-cov, of rustc's own LLVM version [default: the toolchain's, `rustup component add llvm-tools`]
    #[arg(long, value_name = "FOLDER")]
    llvm: Option<PathBuf>,
    /// Folders below crates/
    #[arg(long, value_delimiter = ',', default_values = CRATES)]
    crates: Vec<String>,
    /// Run nothing, and make the table of what the last run left
    #[arg(long)]
    again: bool,
}

/// Builds everything with counters, runs the tests, and prints and writes down how many lines were run: `docs/coverage.md`.
pub(crate) fn coverage(arguments: &Arguments) -> Result<()> {
    let llvm = arguments.llvm.clone().map_or_else(of_toolchain, Ok)?;
    let (profdata, cov) = (llvm.join("llvm-profdata"), llvm.join("llvm-cov"));
    if !cov.is_file() {
        bail!(
            "no llvm-cov in {}: `rustup component add llvm-tools`, or name its folder with --llvm",
            llvm.display()
        );
    }
    let target = target_dir()?.join("coverage");
    let profiles = target.join("profiles");
    let ran = if arguments.again { Ok(()) } else { measure(&target, &profiles) };

    let merged = target.join("merged.profdata");
    let raw = files(&profiles, "profraw")?;
    run(bounded(TOOLS, profdata)
        .args(["merge", "--sparse", "--failure-mode=all", "-o"])
        .arg(&merged)
        .args(raw))?;
    let mut export = bounded(TOOLS, cov);
    export.args(["export", "--format=lcov", "--skip-functions", "--instr-profile"]).arg(&merged);
    for object in objects(&target)? {
        export.arg("--object").arg(object);
    }
    let lines = lines(&output(&mut export)?, &arguments.crates);
    let text = table(&lines, &arguments.crates);
    print!("{text}");
    fs::write(root().join("docs/coverage.md"), text)?;
    ran
}

/// Where rustup puts LLVM's tools.
fn of_toolchain() -> Result<PathBuf> {
    let rustc = || bounded(TOOLS, "rustc");
    let sysroot = output(rustc().args(["--print", "sysroot"]))?;
    let host = output(rustc().args(["--print", "host-tuple"]))?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib").join(host.trim()).join("bin"))
}

fn measure(target: &Path, profiles: &Path) -> Result<()> {
    setup_or_skip()?;
    let _ = fs::remove_dir_all(profiles);
    fs::create_dir_all(profiles)?;
    // By this the tests know the folder where programs are; cargo writes it only into folders that it makes itself.
    fs::write(target.join("CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55\n")?;
    let lab = target.join("lab");
    if !lab.exists() {
        std::os::unix::fs::symlink("../lab", lab)?;
    }
    let counting = || {
        let mut command = cargo(LIMIT);
        command
            .env("RUSTFLAGS", "-C instrument-coverage")
            .env("CARGO_TARGET_DIR", target)
            .env("LLVM_PROFILE_FILE", profiles.join(PROFILES));
        command
    };
    let build = |arguments: &[&str]| run(counting().args(["build", "--release"]).args(arguments));
    build(&["-p", "dwcpd", "-p", "dwcpctl", "-p", "dwcp-control", "-p", "dwcp-sim", "-p", "dwcp-wan"])?;
    build(&["-p", "dwcpd", "--features", "fault-points", "--bin", "dwcpd-faulty"])?;
    let packages = RUN.iter().flat_map(|name| ["--package", name]);
    // A test that fails for being slow has run its lines all the same.
    run(counting().args(["nextest", "run", "--release", "--no-fail-fast"]).args(packages))
}

/// The programs that counted: those of the agents, and the tests.
fn objects(target: &Path) -> Result<Vec<PathBuf>> {
    let release = target.join("release");
    let mut objects: Vec<PathBuf> =
        ["dwcpd", "dwcpd-faulty", "dwcpctl"].map(|name| release.join(name)).into_iter().collect();
    for entry in fs::read_dir(release.join("deps"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        // Those of the two crates that run their code in their own process.
        let of_tests = [
            "dwcp_proto-",
            "dwcp_migrate-",
            "simulation-",
            "handover_model-",
            "ends-",
            "mode-",
            "restart-",
            "simulated-",
            "switch-",
            "together-",
        ];
        if path.extension().is_none() && of_tests.iter().any(|start| name.starts_with(start)) {
            objects.push(path);
        }
    }
    Ok(objects)
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("{}: run without --again", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension() == Some(OsStr::new(extension))).collect())
}

/// Lines of a file: all with code, and those that were run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Lines {
    all: u64,
    run: u64,
}

/// By file below `crates`, of what an lcov tracefile says. Tests within a file do not count: they run themselves.
fn lines(lcov: &str, crates: &[String]) -> BTreeMap<String, Lines> {
    let root = root();
    let mut found: BTreeMap<String, BTreeMap<u64, u64>> = BTreeMap::new();
    let mut file = None;
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            let path = Path::new(path).strip_prefix(&root).ok().and_then(Path::to_str);
            let wanted =
                |path: &&str| crates.iter().any(|name| path.starts_with(&format!("crates/{name}/src/")));
            file = path.filter(wanted).map(str::to_owned);
        } else if let (Some(file), Some((number, count))) =
            (&file, line.strip_prefix("DA:").and_then(|line| line.split_once(',')))
            && let (Ok(number), Ok(count)) = (number.parse(), count.parse::<u64>())
        {
            *found.entry(file.clone()).or_default().entry(number).or_default() += count;
        }
    }
    let is_test = |path: &str| path.ends_with("/tests.rs") || path.contains("/tests/");
    let mut counted = BTreeMap::new();
    for (path, lines) in found.into_iter().filter(|(path, _)| !is_test(path)) {
        let text = fs::read_to_string(root.join(&path)).unwrap_or_default();
        let end = tests_begin(&text);
        let mut sum = Lines::default();
        for count in lines.range(..end).map(|(_, count)| *count) {
            sum.all += 1;
            sum.run += u64::from(count > 0);
        }
        counted.insert(path, sum);
    }
    counted
}

/// The number of the line on which a file's own tests begin.
fn tests_begin(text: &str) -> u64 {
    let numbered: Vec<(u64, &str)> = (1..).zip(text.lines()).collect();
    let tests = numbered.windows(2).find(|two| two[0].1 == "#[cfg(test)]" && two[1].1.starts_with("mod "));
    tests.map_or(u64::MAX, |two| two[0].0)
}

fn table(lines: &BTreeMap<String, Lines>, crates: &[String]) -> String {
    let mut text = "# Coverage\n\nMade by `cargo xtask coverage`: lines with code that the tests of this repository run, by LLVM's \
                    instrumentation; the tests themselves do not count, and an agent that is killed adds nothing of what it ran.\n\n\
                    | | lines | run | |\n|---|---:|---:|---:|\n"
        .to_owned();
    let mut row = |name: &str, Lines { all, run }: Lines| {
        text += &format!("| {name} | {all} | {run} | {:.1} % |\n", 100.0 * run as f64 / all.max(1) as f64);
    };
    for name in crates {
        let inside = || lines.iter().filter(|(path, _)| path.starts_with(&format!("crates/{name}/")));
        let sum = inside().fold(Lines::default(), |sum, (_, lines)| Lines {
            all: sum.all + lines.all,
            run: sum.run + lines.run,
        });
        row(&format!("**dwcp-{name}**"), sum);
        inside().for_each(|(path, lines)| row(&format!("`{path}`"), *lines));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_tests_and_of_other_crates_do_not_count() {
        let here = root();
        let file = "crates/proto/src/frame.rs";
        let tests = tests_begin(&fs::read_to_string(here.join(file)).unwrap());
        let lcov = format!(
            "SF:{0}/{file}\nDA:1,0\nDA:2,5\nDA:{tests},9\nend_of_record\nSF:{0}/{file}\nDA:1,1\nend_of_record\n\
             SF:{0}/crates/hde/src/lib.rs\nDA:1,1\nend_of_record\n",
            here.display()
        );
        let counted = lines(&lcov, &["proto".to_owned()]);
        assert_eq!(counted.into_iter().collect::<Vec<_>>(), [(file.to_owned(), Lines { all: 2, run: 2 })]);
    }
}
