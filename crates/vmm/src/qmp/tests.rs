//! The client against a scripted server, good and bad. Against the real QEMU: `tests/real.rs`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::*;

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"\"}, \
     \"capabilities\": [\"oob\", \"news\"]}}\r\n";

/// Short where a test waits for it to pass, long where it must not.
fn config(command: Duration) -> QmpConfig {
    QmpConfig { connect: Duration::from_secs(30), command }
}

const LONG: Duration = Duration::from_secs(30);

struct Server {
    stream: BufReader<UnixStream>,
}

impl Server {
    /// Answers the next command by `answer(command)`, a text with `ID` in place of its id.
    async fn answer(&mut self, answer: impl Fn(&Value) -> String) -> Value {
        let request = self.request().await;
        let answer = answer(&request).replace("ID", &request["id"].to_string());
        self.say(&answer).await;
        request
    }

    async fn request(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn say(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
        self.stream.write_all(b"\r\n").await.unwrap();
    }
}

fn ok(_: &Value) -> String {
    "{\"return\": {}, \"id\": ID}".into()
}

struct Place {
    _dir: tempfile::TempDir,
    path: PathBuf,
    listener: UnixListener,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    Place { listener: UnixListener::bind(&path).unwrap(), path, _dir: dir }
}

impl Place {
    async fn accept(&self, greeting: &str) -> Server {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut server = Server { stream: BufReader::new(stream) };
        server.say(greeting).await;
        server
    }

    async fn pair(&self, config: QmpConfig) -> (Qmp, Server) {
        let serve = async {
            let mut server = self.accept(GREETING).await;
            let request = server.answer(ok).await;
            assert_eq!(request["execute"], "qmp_capabilities");
            server
        };
        let (qmp, server) = tokio::join!(Qmp::connect(&self.path, config), serve);
        (qmp.unwrap(), server)
    }
}

#[tokio::test]
async fn answers_find_their_commands_and_events_come_in_between() {
    let place = place();
    let (qmp, mut server) = place.pair(config(LONG)).await;
    assert_eq!(qmp.version().to_string(), "10.0.2");
    let mut events = qmp.events();
    let serve = async {
        let (first, second) = (server.request().await, server.request().await);
        server.say("{\"event\": \"FROM_THE_FUTURE\", \"data\": {\"x\": 1}, \"later\": 2}").await;
        server.say(&format!("{{\"return\": 2, \"id\": {}}}", second["id"])).await;
        server.say("{\"return\": 0, \"id\": 99999}").await;
        server.say("{\"news\": 0}").await;
        server.say("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 5, \"microseconds\": 7}}").await;
        server.say(&format!("{{\"return\": 1, \"id\": {}}}", first["id"])).await;
        (first, second)
    };
    let (a, b, (first, second)) =
        tokio::join!(qmp.execute("a", json!({ "x": 1 })), qmp.execute("b", Value::Null), serve);
    assert_eq!((a.unwrap(), b.unwrap()), (json!(1), json!(2)));
    assert_eq!(first["arguments"], json!({ "x": 1 }));
    assert!(second.get("arguments").is_none());
    let event = events.recv().await.unwrap();
    assert_eq!((event.name.as_str(), event.kind(), event.at), ("FROM_THE_FUTURE", EventKind::Other, None));
    let event = events.recv().await.unwrap();
    assert_eq!((event.kind(), event.at), (EventKind::Stop, Some(Duration::new(5, 7000))));
}

#[tokio::test]
async fn a_refusal_carries_the_vmms_words() {
    let place = place();
    let (qmp, mut server) = place.pair(config(LONG)).await;
    let refuse =
        |_: &Value| "{\"id\": ID, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}".to_owned();
    let (outcome, _) = tokio::join!(qmp.execute("cont", Value::Null), server.answer(refuse));
    let error = outcome.unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(error.to_string(), "cont: no");
}

#[tokio::test]
async fn a_hanging_vmm_costs_the_time_limit_and_not_the_connection() {
    let place = place();
    let (qmp, mut server) = place.pair(config(LONG)).await;
    let outcome = qmp.execute_within("stop", Value::Null, Duration::from_millis(1)).await;
    assert!(matches!(outcome, Err(QmpError::Timeout { .. })), "{outcome:?}");
    // The command was given up either before it was written or after; the next one works.
    let serve = async {
        loop {
            let request = server.answer(ok).await;
            if request["execute"] == "next" {
                break;
            }
        }
    };
    let (next, ()) = tokio::join!(qmp.execute("next", Value::Null), serve);
    next.unwrap();
}

#[tokio::test]
async fn garbage_and_endless_lines_end_the_connection_with_their_reason() {
    for (text, want) in [
        ("what?".to_owned(), "garbage"),
        ("[1]".to_owned(), "garbage"),
        ("{\"event\": 7}".to_owned(), "garbage"),
        ("{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}".to_owned(), "garbage"),
        ("[".repeat(4096), "garbage"),
        (format!("{{\"return\": \"{}\"}}", "x".repeat(MAX_LINE)), "line of more than"),
    ] {
        let place = place();
        let (qmp, mut server) = place.pair(config(LONG)).await;
        let mut events = qmp.events();
        let serve = async {
            server.request().await;
            // The client may hang up before it took everything.
            let _ = server.stream.write_all(text.as_bytes()).await;
            let _ = server.stream.write_all(b"\n").await;
        };
        let (outcome, ()) = tokio::join!(qmp.execute("query-status", Value::Null), serve);
        let error = outcome.unwrap_err();
        let QmpError::Closed { source, .. } = &error else { panic!("{error}") };
        assert!(source.to_string().contains(want), "{source}");
        assert!(matches!(events.recv().await, Err(EventsError::Closed(_))));
        assert!(qmp.ended().is_some());
        let again = qmp.execute("query-status", Value::Null).await;
        assert!(matches!(again, Err(QmpError::Closed { .. })));
        assert!(matches!(qmp.events().recv().await, Err(EventsError::Closed(_))));
    }
}

#[tokio::test]
async fn what_the_vmm_said_before_it_went_is_delivered() {
    let place = place();
    let (qmp, mut server) = place.pair(config(LONG)).await;
    let mut events = qmp.events();
    server.say("{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": false}}").await;
    drop(server);
    assert_eq!(events.recv().await.unwrap().kind(), EventKind::Shutdown);
    assert!(matches!(events.recv().await, Err(EventsError::Closed(Ended::ByVmm))));
    let outcome = qmp.execute("query-status", Value::Null).await;
    assert!(matches!(outcome, Err(QmpError::Closed { source: Ended::ByVmm, .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_slow_reader_is_told_that_it_lost_events() {
    let place = place();
    let (qmp, mut server) = place.pair(config(LONG)).await;
    let mut slow = qmp.events();
    drop(qmp.events());
    let count = 1025;
    let serve = async {
        for pass in 1..=count {
            server.say(&format!("{{\"event\": \"MIGRATION_PASS\", \"data\": {{\"pass\": {pass}}}}}")).await;
        }
        server.answer(ok).await;
    };
    let (done, ()) = tokio::join!(qmp.execute("query-status", Value::Null), serve);
    done.unwrap();
    for pass in 1..count {
        assert_eq!(slow.recv().await.unwrap().kind(), EventKind::MigrationPass(pass));
    }
    assert!(matches!(slow.recv().await, Err(EventsError::Overrun)));
}

#[tokio::test]
async fn a_dropped_command_is_not_written() {
    let place = place();
    let (qmp, mut server) = place.pair(config(LONG)).await;
    {
        // Polled once: in the queue, and then given up while the link's task has not run yet.
        let mut stop = std::pin::pin!(qmp.execute("stop", Value::Null));
        std::future::poll_fn(|context| {
            assert!(stop.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
    }
    let (done, request) = tokio::join!(qmp.execute("query-status", Value::Null), server.answer(ok));
    done.unwrap();
    assert_eq!(request["execute"], "query-status");
}

#[tokio::test]
async fn a_wrong_path_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Qmp::connect(&dir.path().join("no"), config(LONG)).await.unwrap_err();
    assert!(missing.to_string().contains("is QEMU started with -qmp unix:"), "{missing}");
    assert!(std::error::Error::source(&missing).unwrap().to_string().contains("does not exist"));
    let place = place();
    let (outcome, _server) =
        tokio::join!(Qmp::connect(&place.path, config(LONG)), place.accept("SSH-2.0-OpenSSH"));
    let error = outcome.unwrap_err();
    assert!(error.to_string().contains("does not speak QMP; it began with \"SSH-2.0-OpenSSH"), "{error}");
    // A second client of a QMP socket is left in the backlog: it connects and hears nothing.
    let short = QmpConfig { connect: Duration::from_millis(1), command: LONG };
    let error = Qmp::connect(&place.path, short).await.unwrap_err();
    assert!(error.to_string().contains("is another one connected?"), "{error}");
}
