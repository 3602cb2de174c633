//! `dwcpctl resolve`: an operator decides where the agents may not. It says what the decision does before it is taken.

use std::io::{BufRead, IsTerminal, Read, Write};

use dwcp_rpc::v1::Blame;

use crate::args::ResolveArgs;
use crate::client::{Client, SLOW, within};
use crate::error::{CtlError, Exit, explain, one_line};
use crate::explain::{field, sides, standing};
use crate::json;

/// Code of a failure: the operator has not said yes.
const NOT_CONFIRMED: &str = "not_confirmed";
/// Bytes of an answer that are read; yes is shorter.
const MAX_ANSWER: u64 = 64;

/// Runs the command.
pub(crate) async fn run(mut client: Client, args: &ResolveArgs) -> Result<Exit, CtlError> {
    let (question, order) = (args.request(false), args.request(true));
    let sides = sides(&mut client, &order.id).await?;
    if !args.json {
        sides.iter().for_each(|side| print!("{}", standing(side)));
        print!("{}", field("decision", decision(args)));
    }
    let would = client.resolve(within(SLOW, question.clone())).await?.into_inner();
    if !args.json {
        print!("{}", field("effect", &would.text));
    }
    if !args.yes {
        if args.json {
            let missing = needs_yes();
            json::print(&json::resolved(&question, &would, Some(&missing.failure)));
            explain(&missing.failure);
            return Ok(missing.exit);
        }
        confirm().await?;
    }

    let done =
        client.resolve(within(SLOW, order.clone())).await.map_err(|status| unsure(status, &order.id))?;
    let done = done.into_inner();
    if args.json {
        json::print(&json::resolved(&order, &done, None));
    } else {
        match done.text == would.text {
            true => println!("done; see how it ends: dwcpctl explain {}", order.id),
            false => {
                println!("done: {}; see how it ends: dwcpctl explain {}", one_line(&done.text), order.id)
            }
        }
    }
    Ok(Exit::Done)
}

fn decision(args: &ResolveArgs) -> &'static str {
    match (args.start_here, args.peer_fenced) {
        (true, true) => "start here; the peer's VMM has ended and stays so (your word)",
        (true, false) => "start here",
        (false, _) => "leave to the peer",
    }
}

/// Asks for the word yes where somebody can read and answer.
async fn confirm() -> Result<(), CtlError> {
    std::io::stdout().flush().map_err(|e| CtlError::local("cannot write", &e))?;
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(needs_yes());
    }
    eprint!("Type yes to do this, anything else to leave everything as it is: ");
    // On a thread of its own: the connection is kept alive while the operator thinks.
    let answer = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().lock().take(MAX_ANSWER).read_line(&mut answer).map(|_| answer)
    });
    match answer.await {
        Ok(Ok(answer)) if answer.trim() == "yes" => Ok(()),
        _ => Err(CtlError::new(
            Exit::Failed,
            Blame::Operator,
            NOT_CONFIRMED,
            "not confirmed; nothing was changed",
            "",
        )),
    }
}

fn needs_yes() -> CtlError {
    CtlError::new(
        Exit::BadRequest,
        Blame::Operator,
        NOT_CONFIRMED,
        "nothing was changed: nobody is here to be asked",
        "add --yes to do what is said above",
    )
}

/// The order was sent. Where no answer came, it may have been taken all the same.
fn unsure(status: tonic::Status, id: &str) -> CtlError {
    let mut error = CtlError::from(status);
    if error.exit == Exit::Unreachable {
        error.failure.hint = format!("whether it was done is not known here; see dwcpctl explain {id}");
    }
    error
}

#[cfg(test)]
mod tests {
    use dwcp_rpc::v1;

    use super::*;

    #[test]
    fn an_order_without_an_answer_leaves_it_open() {
        let lost = unsure(tonic::Status::unavailable("gone"), "m-1");
        assert!(lost.failure.hint.contains("not known here; see dwcpctl explain m-1"));
        let failure =
            v1::Failure { code: "not_in_doubt".to_owned(), hint: "see".to_owned(), ..Default::default() };
        assert_eq!(unsure(dwcp_rpc::failure::to_status(&failure), "m-1").failure, failure);
    }
}
